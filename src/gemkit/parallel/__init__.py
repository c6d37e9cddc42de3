"""More than one device: a mesh, a layout (which device holds which part of a weight), and a plan of what it costs.

Nothing is imported here: `executors` may read `parallel.layout` without what `parallel.plan` needs.
"""
