"""One engine that answers requests and works for the windows, in turns (service.serving.turns).

    order.py    whose turn it is: a policy, which knows no engine
    server.py   in the engine's process: loads the weights of whose turn it is
    client.py   in a window's run: the interface of an engine, over the socket of that process

Imports: what services/serving may import. client.py is imported by actors of a window's run, so it needs no vLLM.
"""
