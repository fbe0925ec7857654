"""What does a step compile to on a GPU, are its kernels right, and how fast is it?"""
