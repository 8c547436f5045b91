"""The commands of `sdft`. May import everything."""
