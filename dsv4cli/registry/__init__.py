"""Models by name: what is known (`catalog`) and what is on this machine (`store`). No torch, no network."""
