"""`baton up`: plan which processes run here, start them, keep them running, show what happens, stop them."""
