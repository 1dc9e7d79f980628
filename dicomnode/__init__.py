"""The node: network, disk, clock. Importing it loads neither torch nor pydicom."""

__version__ = "0.1.0"
