"""What compilers say about programs and kernels, also for devices that are not attached."""
