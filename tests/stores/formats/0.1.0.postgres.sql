SET statement_timeout = 0;
SET lock_timeout = 0;
SET idle_in_transaction_session_timeout = 0;
SET client_encoding = 'UTF8';
SET standard_conforming_strings = on;
SELECT pg_catalog.set_config('search_path', '', false);
SET check_function_bodies = false;
SET xmloption = content;
SET client_min_messages = warning;
SET row_security = off;
SET default_tablespace = '';
SET default_table_access_method = heap;
CREATE TABLE public.v010_heads (
    id bigint NOT NULL,
    digest bytea NOT NULL,
    space bytea NOT NULL,
    key bytea NOT NULL,
    expire_at double precision,
    bytes bigint NOT NULL,
    state bytea NOT NULL
);
ALTER TABLE public.v010_heads ALTER COLUMN id ADD GENERATED ALWAYS AS IDENTITY (
    SEQUENCE NAME public.v010_heads_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1
);
CREATE TABLE public.v010_items (
    head bigint NOT NULL,
    sequence bigint NOT NULL,
    data bytea NOT NULL
);
CREATE TABLE public.v010_leases (
    digest bytea NOT NULL,
    token bigint NOT NULL,
    owner text NOT NULL,
    expires_at timestamp with time zone NOT NULL
);
CREATE TABLE public.v010_numbers (
    name text NOT NULL,
    value bigint NOT NULL
);
CREATE TABLE public.v010_quarantine (
    id bigint NOT NULL,
    space bytea,
    key bytea,
    sequence bigint,
    problem text,
    found_at double precision,
    data bytea
);
ALTER TABLE public.v010_quarantine ALTER COLUMN id ADD GENERATED ALWAYS AS IDENTITY (
    SEQUENCE NAME public.v010_quarantine_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1
);
CREATE TABLE public.v010_settings (
    name text NOT NULL,
    value text NOT NULL
);
INSERT INTO public.v010_heads OVERRIDING SYSTEM VALUE VALUES (1, '\x4bb8e179b348ad5549e610841cf4b974591bbfb6', '\x6368617473', '\xa3616e6e', NULL, 33, '\xa592655098cf3cfd0fea2bb57fc402c30421cb41da13b860000000c092920001920204');
INSERT INTO public.v010_heads OVERRIDING SYSTEM VALUE VALUES (2, '\x53ea31120f12c7e475b33b03670983cc0e458245', '\x73657474696e6773', '\x93a16101c0', NULL, 61, '\x290a91dd98cf05d3c356eb088b6e01c2013dcb41da13b860000000c091920001');
INSERT INTO public.v010_heads OVERRIDING SYSTEM VALUE VALUES (3, '\x82b84944bdc52d6cab5b2bdbb1368cbe3318b980', '\x6368617473', '\x07', NULL, 0, '\xbbcd3b9198cf05d3c356eb088b6e01c30000cb41da13b860000000c090');
INSERT INTO public.v010_heads OVERRIDING SYSTEM VALUE VALUES (4, '\x7da7d042c1aab063f816246b6202614552f560e1', '\x73657474696e6773', '\xa86c69766573206f6e', 4000000000, 6, '\x937f910098cf59f3c4fc9a3eb3e501c20106cb41da13b860000000cb41edcd650000000091920001');
INSERT INTO public.v010_items VALUES (1, 2, '\xf22d7b7f01a57468726565');
INSERT INTO public.v010_items VALUES (1, 0, '\xfefb346101a6656469746564');
INSERT INTO public.v010_items VALUES (1, 3, '\x4ebcf23101a4666f7572');
INSERT INTO public.v010_items VALUES (2, 0, '\xfb2af19f0183a47768656ec71901323032362d31312d32315431323a30303a30302b30303a3030a3726177c4020001a16e93cb3ff8000000000000c0c3');
INSERT INTO public.v010_items VALUES (4, 0, '\x2fc513280101');
INSERT INTO public.v010_leases VALUES ('\x4bb8e179b348ad5549e610841cf4b974591bbfb6', 1796079507228042, 'vm:12984', '2026-11-30 22:58:27.229943+00');
INSERT INTO public.v010_numbers VALUES ('syncs', 0);
INSERT INTO public.v010_numbers VALUES ('floor', 1);
INSERT INTO public.v010_settings VALUES ('codec', 'msgpack');
INSERT INTO public.v010_settings VALUES ('version', '1');
SELECT pg_catalog.setval('public.v010_heads_id_seq', 5, true);
SELECT pg_catalog.setval('public.v010_quarantine_id_seq', 1, false);
ALTER TABLE ONLY public.v010_heads
    ADD CONSTRAINT v010_heads_digest_key UNIQUE (digest);
ALTER TABLE ONLY public.v010_heads
    ADD CONSTRAINT v010_heads_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.v010_items
    ADD CONSTRAINT v010_items_pkey PRIMARY KEY (head, sequence);
ALTER TABLE ONLY public.v010_leases
    ADD CONSTRAINT v010_leases_pkey PRIMARY KEY (digest);
ALTER TABLE ONLY public.v010_numbers
    ADD CONSTRAINT v010_numbers_pkey PRIMARY KEY (name);
ALTER TABLE ONLY public.v010_quarantine
    ADD CONSTRAINT v010_quarantine_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.v010_settings
    ADD CONSTRAINT v010_settings_pkey PRIMARY KEY (name);
CREATE INDEX v010_heads_by_end ON public.v010_heads USING btree (expire_at) WHERE (expire_at IS NOT NULL);
CREATE INDEX v010_heads_by_space ON public.v010_heads USING btree (space, id);
