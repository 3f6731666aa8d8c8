"""From instances and policy to xDS resources: pure functions.

The resources are the ones that C-core, Go, Java and Node all accept; each odd choice is a rule that one
of them needs.
"""
