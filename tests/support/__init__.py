"""Helpers of the tests, a module each: tiny members and their files, stand-ins, oracles, the kernels compiled alone."""
