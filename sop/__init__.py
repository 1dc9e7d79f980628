"""DICOM objects: data sets in, Volume out, and back. Imports neither torch nor the network."""
