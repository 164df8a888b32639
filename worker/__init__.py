"""What prefill and decode workers share: the engine seen from the event loop, the wire, the process."""
