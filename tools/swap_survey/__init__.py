"""The parts of survey_swaps.py."""
