"""What keeps a run within its budget: price controllers, the trust region, and how its step length adapts."""
