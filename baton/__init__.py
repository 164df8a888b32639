"""The command line: starts the services as processes, talks to them over HTTP, never imports torch."""
