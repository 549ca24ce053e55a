"""The chaos run: real parts, random faults, and a check of what is left."""
