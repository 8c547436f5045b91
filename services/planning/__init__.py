"""Everything that is checked before a process starts: model, memory, plan, fingerprint. No ray."""
