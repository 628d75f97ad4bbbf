"""The jobs of the platform, and what they need of Ray, MLflow and Kubernetes; `aldm/cli.py` names the file of each."""
