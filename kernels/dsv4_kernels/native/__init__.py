"""Kernels in C++ for the CPU, compiled once per machine by its own compiler."""
