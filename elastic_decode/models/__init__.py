"""Model families: one decoder by configuration, and the weights it reads."""
