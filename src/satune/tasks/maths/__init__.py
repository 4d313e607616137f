"""Mathematics with a final answer in a box: ``task`` reads rows and grades, ``boxes`` finds what a
box holds, ``worker`` compares in a process of its own. There an answer goes through ``notation``
(tokens), ``brackets``, ``terms`` (expressions), ``units`` and ``reading`` (what it says) to
``comparison``, which asks ``values``."""
