"""What the computer offers: files, memory, devices, threads, and a terminal to report progress on."""
