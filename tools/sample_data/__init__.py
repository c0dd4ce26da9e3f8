"""Scenes of coloured shapes, and the dataset formats they are written in."""
