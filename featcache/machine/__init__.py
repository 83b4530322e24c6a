"""What the computer offers: files, memory, devices, threads, and what a person sees."""
