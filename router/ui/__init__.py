"""The live page at /ui: what the system does at a glance, and a place to chat."""
