"""The service's HTTP interface: routes, errors, tokens, limits and the page. Imports the rest of serving."""
