-- What the application of the upgrade test has in the database: what it booked, and what its rows brought about.

CREATE TABLE public.booked (row_id bigint NOT NULL);
CREATE TABLE public.booked_many (tag text NOT NULL, rows integer NOT NULL);

-- Without a key: a row that takes effect twice is to be seen. running: rows of its topic that ran at that moment.
CREATE TABLE public.effect (
    seq          bigint GENERATED ALWAYS AS IDENTITY,
    row_id       bigint NOT NULL,
    topic        text NOT NULL,
    ordering_key text,
    attempt      integer NOT NULL,
    place        text,
    running      bigint
);

CREATE FUNCTION public.tell_effect() RETURNS trigger
LANGUAGE plpgsql
AS $$
BEGIN
    PERFORM pg_notify('shop_effect', NEW.row_id || ' ' || coalesce(NEW.place, ''));
    RETURN NULL;
END
$$;
CREATE TRIGGER tell_effect AFTER INSERT ON public.effect FOR EACH ROW EXECUTE FUNCTION public.tell_effect();

-- The effect of a row whose handler only returns: the transaction that ends it writes it.
CREATE FUNCTION public.returned() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER
AS $$
BEGIN
    INSERT INTO public.effect (row_id, topic, attempt) VALUES (NEW.id, NEW.topic, NEW.attempt);
    RETURN NULL;
END
$$;
CREATE TRIGGER shop_returned AFTER UPDATE ON outwake.outbox FOR EACH ROW
    WHEN (NEW.topic = 'shop.returned' AND NEW.state = 'done' AND OLD.state <> 'done')
    EXECUTE FUNCTION public.returned();

INSERT INTO outwake.topic (name, max_running) VALUES ('shop.limited', 2);
