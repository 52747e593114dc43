"""``dist-layerlr audit``: what any training script's optimizer really does, script unchanged.

The parent (``run``) starts the command with a folder in PYTHONPATH whose ``sitecustomize`` calls
``bootstrap.start`` in every Python process. It waits for torch, and hooks (``hooks``) the creation
and the steps of optimizers. At the first steps the live models are found (``models``), read and
watched (``record``), and each rank writes one file. The parent merges them (``merge``), judges
(``findings``), and prints (``table``).
"""
