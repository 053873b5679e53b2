"""The operators on CPUs, in C++."""
