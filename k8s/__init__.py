"""Manifests for Kubernetes: data of `aldm k8s render`, no code. README.md says what lies where."""
