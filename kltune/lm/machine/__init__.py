"""What is computed on: threads, devices, their memory, and layers spread over several."""
