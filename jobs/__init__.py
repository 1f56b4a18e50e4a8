"""What a user runs; each job parses, loads the configuration and hands over."""
