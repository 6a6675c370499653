"""Checkpoints that are complete or absent, checked by checksum before they are read, and independent of the layout.

`manifest`, `directory` and `fence` know files and names and do not need torch; `metadata`, `writer`, `save`, `load` and `convert`
know tensors; `saver` saves while training goes on and `durable` copies to where it outlives the machine.

    checkpoints/
        latest                      name of the newest checkpoint, for people and scripts
        step-00000500/              complete: it gets this name by one rename, when everything in it is on disk
            __0_0.distcp ...        torch.distributed.checkpoint's shards, one file a rank
            .metadata               which tensor lies where in them
            facts.json              step, position in the data, schedule, resolved config, layout ...
            manifest.json           size and checksum of every file above, and its own
        .step-00001000.tmp-1f…      being written or being removed; what a dead writer left goes at the next save
        .step-00000500.old-9a…      a checkpoint that is being replaced; it counts until its successor has its name

A durable copy is the same directory at another address, without renames: its manifest is written last and removed first.
"""
