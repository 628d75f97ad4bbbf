"""One job a file, each with main(argv); the aldm command resolves them by name."""
