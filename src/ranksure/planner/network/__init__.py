"""The network itself answers: lambda, the certified point, what each rank reaches, the smallest that suffice."""
