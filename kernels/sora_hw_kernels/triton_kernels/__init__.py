"""Kernels in the Triton language, shared by the devices that it compiles for; each device launches them its way."""
