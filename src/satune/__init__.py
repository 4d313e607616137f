"""Teams of language models, trained one agent at a time inside measured trust regions."""
