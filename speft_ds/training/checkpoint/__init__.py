"""Checkpoints: all that a run needs to go on, on any number of ranks.

    checkpoints/step_000100/
        part_00000.safetensors   what rank 0 held, in global coordinates (see `parts`)
        part_00001.safetensors   ...
        manifest.json            step, run, recipe, base, schedule; size and sha256 of each part
        COMPLETE                 sha256 of the manifest; written last: without it nothing counts

No base weight is in it. About 16 bytes a trained weight: index, delta and two moments, 4 bytes each.
"""
