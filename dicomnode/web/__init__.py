"""The status page and the REST API: a process of its own that reads the ledger and the derived folders.

    app       the application: its parts, in one place
    site      what every handler works with: configuration, ledger, spool, clock, templates
    access    who may look, who may act
    run       the process

A handler takes values from the ledger (dicomnode.views, dicomnode.operate) and hands them to a template or to JSON; it
decides nothing itself.
"""
