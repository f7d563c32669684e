"""The commands of ``python -m backbones``. The docstring of a module is its help; what the user can
fix is raised as an error of one line, :class:`backbones.common.errors.UserError` or the library's.
"""
