"""Experience: what a policy lived through, as time-major tensors, and what is made of it."""
