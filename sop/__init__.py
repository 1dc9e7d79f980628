"""DICOM objects: data sets in, Volume out, and back. Imports neither torch nor the network."""

from pydicom import config

# What a damaged header holds is judged here, attribute by attribute; pydicom's warnings would print values, among them
# names, to the log.
config.settings.reading_validation_mode = config.IGNORE
