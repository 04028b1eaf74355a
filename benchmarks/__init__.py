"""What is measured. How it is measured is `densebench.measure`."""
