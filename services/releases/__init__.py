"""What a service has decided: windows, candidates, releases, states of records. Imports records, config and base."""
