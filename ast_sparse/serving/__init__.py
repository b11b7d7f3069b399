"""Plug-ins that let serving engines read compressed exports."""
