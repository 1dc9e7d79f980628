"""What the node answers besides C-STORE and C-ECHO: storage commitment, and query and retrieve on its own spool.

    findscp     pure: what matches a query, what is answered
    catalogue   what we hold: the ledger, one header per series, derived series that passed their check
    moving      C-MOVE and C-GET
    commitscp   storage commitment: asked for what we received, answered on the same or on a new association
    desk        the door: which request of which peer goes where, with which right
"""
