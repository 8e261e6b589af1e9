"""What is installed and how it loads: the build for the torch that runs, and the paths for C++."""
