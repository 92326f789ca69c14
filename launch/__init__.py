"""The command line, accelerate configurations, the quickstart. Starts the other rooms; imported by none."""
