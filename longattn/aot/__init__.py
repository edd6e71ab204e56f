"""Compiles programs and kernels ahead of time, also for devices that are not attached, and reads the result."""
