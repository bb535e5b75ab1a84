"""Memory and time of trainings and decoding before anything is compiled or rented, in closed form
and without JAX.
"""
