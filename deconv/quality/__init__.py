"""Blind image quality: figures of merit that need no truth.

`deconv.quality.brisque` comes with its model; `deconv.quality.clip_iqa` needs a file of weights.
"""
