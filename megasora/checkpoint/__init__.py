"""Checkpoints that are complete or absent, checked by checksum before they are read, and independent of the layout.

`manifest` and `directory` know files and names and do not need torch; `metadata`, `save` and `load` know tensors.

    checkpoints/
        latest                      name of the newest checkpoint, for people and scripts
        step-00000500/              complete: it gets this name by one rename, when everything in it is on disk
            __0_0.distcp ...        torch.distributed.checkpoint's shards, one file a rank
            .metadata               which tensor lies where in them
            facts.json              step, position in the data, schedule, resolved config, layout ...
            manifest.json           size and checksum of every file above, and its own
        .step-00001000.tmp-1f…      being written or being removed; what a dead writer left goes at the next save
        .step-00000500.old-9a…      a checkpoint that is being replaced; it counts until its successor has its name
"""
