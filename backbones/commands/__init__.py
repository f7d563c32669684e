"""``python -m backbones zoo | memory | drift | evaluate | predict``.

The docstring of a command's module is its help. What the user can fix is raised as an error of one
line, :class:`backbones.common.errors.UserError` or those of the library.
"""
