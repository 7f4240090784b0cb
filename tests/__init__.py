"""A package, so that pytest puts the repository on the path, and not this folder with its folders named as packages."""
