"""What is looked at before anything is lost: settings and files before Ray starts, batches before they are trained on.

Each refusal is one ``ValueError`` that names the key, its value and what would do.
"""
